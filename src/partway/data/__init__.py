"""Records in: what a record is, how a site's file is read, and the bundled data set."""
