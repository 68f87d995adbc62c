"""What an accelerator is asked to do."""
