"""The training jobs that come before the loop: processes of their own that end."""
