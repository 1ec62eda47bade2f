"""Plans: what would run where, how long it takes and what it needs, without starting anything."""
