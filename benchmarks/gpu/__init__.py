"""Everything that a GPU machine can tell, in one command."""
