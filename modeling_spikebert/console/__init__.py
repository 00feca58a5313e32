"""What people read on a terminal or in the log of a job."""
