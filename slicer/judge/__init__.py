"""Evaluation of checkpoints: tasks, loss on text, generation metrics, sweeps over cuts, plots and reports."""
