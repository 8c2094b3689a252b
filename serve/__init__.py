"""Serving sliced checkpoints with vLLM (installed as `slicer.serve`): arrives with the serving milestone."""
