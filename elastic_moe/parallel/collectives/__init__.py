"""Collectives that an abort can end: the signal, the backends, the store through which members meet, and `Group`."""
