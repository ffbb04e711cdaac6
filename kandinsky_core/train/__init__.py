"""Training of the transformer: what it minimises and the data it reads."""
