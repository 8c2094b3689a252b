"""The machine: files, work directories, memory, processes, versions, and patches of other libraries."""
