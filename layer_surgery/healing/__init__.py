"""Stage: healing, which distils the original (the teacher) into the result of surgery (the student)."""
