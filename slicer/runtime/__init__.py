"""What the other stages need of the machine: files, work directories, memory, processes, versions, foreign patches."""
