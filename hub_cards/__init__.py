"""From a run folder to the Hub: the staged folder, its check and scan, the upload; model and dataset cards."""
