"""What people look at: the collector's record, the live page, `twinrl status`, terminal progress and the report."""
