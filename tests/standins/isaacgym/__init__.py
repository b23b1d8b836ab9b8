"""Stand-in of Isaac Gym, Preview 4: see the README beside."""
