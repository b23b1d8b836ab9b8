"""Words and bytes that every process shares. Python 3.8-clean: robot PCs and old simulators import it."""
