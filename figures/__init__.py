"""One function a figure of the paper; reproduce.py calls them."""
