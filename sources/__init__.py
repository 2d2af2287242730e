"""Where data come from. Every source returns a `files.Data`; data.py is the door to all of them."""
