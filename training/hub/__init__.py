"""Publishing a run: staging, the model card, the loading check, the Hub client, the push."""
