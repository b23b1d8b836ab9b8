"""One file for each algorithm, each with update(...) -> metrics and state_dict()."""
