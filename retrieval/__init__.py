"""A trained model at work: encoder, catalogue, search, export, explanations, web page."""
