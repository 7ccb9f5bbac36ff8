"""Mathematical answers: found in a response, read as what they mean, compared exactly. Light to import."""
