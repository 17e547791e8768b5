"""What is drawn and printed of logs: figures, tables, the report page."""
