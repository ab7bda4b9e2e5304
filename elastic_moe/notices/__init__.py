"""Notices of a cloud that this machine will be taken: what they say, where they are read, and what follows. No Ray."""
