"""Small trainings broken at random moments, resumed, and compared with one that was left alone."""
