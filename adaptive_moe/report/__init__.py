"""What people read of a table: text (logs and terminal), plots, and one page for a browser."""
