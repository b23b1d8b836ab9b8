"""The composition root: reads the configuration, builds clients and factories, starts every process."""
