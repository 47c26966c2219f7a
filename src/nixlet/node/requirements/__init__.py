"""What must be so before a node can start: each check raises the error that start-up and doctor show."""
