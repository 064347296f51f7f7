"""Everything that loads, trains, saves and samples a student."""
