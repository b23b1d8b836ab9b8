"""TwinRL: the distributed actor-learner system that turns a robot's digital twin into a robot that works."""

__version__ = "0.1.0"
