"""One harness for teacher, base and students, with the statistics that say whether a difference is real."""
