"""Images, text and data sets as the model takes them."""
