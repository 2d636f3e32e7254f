"""A run's page, report.html: one file that opens offline, made from the other files of the run's folder."""
