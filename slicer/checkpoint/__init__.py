"""A checkpoint on disk: read, sliced, written; no model is built here."""
