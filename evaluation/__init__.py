"""What a model is worth: metrics, named protocols, pictures and the report."""
