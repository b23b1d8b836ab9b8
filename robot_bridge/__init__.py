"""The physical arm's side of TwinRL: the robot PC's process, and the gateway it dials."""
