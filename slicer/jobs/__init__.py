"""The jobs, one file each: their stages in order."""
