"""Drivers, one file for each arm; each is imported only when it is asked for."""
