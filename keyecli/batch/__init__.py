"""Many jobs with one model: read, answered, written down so that nothing is lost and nothing is done twice, and reported."""
