"""Files: weights in and out, pictures and clips."""
