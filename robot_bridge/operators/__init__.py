"""Who takes over from the policy: one file for each kind, and what devices in a hand have in common."""
