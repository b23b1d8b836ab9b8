"""Stand-in of ManiSkill 3: see the README beside."""
