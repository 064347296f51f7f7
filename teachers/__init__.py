"""Everything that loads, shards, samples and serves a teacher."""
