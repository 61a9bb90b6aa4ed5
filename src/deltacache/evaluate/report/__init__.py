"""What a person looks at: the HTML page, its charts and strips, contact sheets, tables in the terminal."""
