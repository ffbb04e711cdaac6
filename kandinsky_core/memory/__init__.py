"""What a run needs and how it is made to fit: estimates, plans and the streaming of weights."""
