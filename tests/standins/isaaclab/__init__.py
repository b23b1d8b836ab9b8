"""Stand-in of Isaac Lab 2.3: see the README beside."""

LAUNCHED = False  # an app runs, without which nothing else can be imported
