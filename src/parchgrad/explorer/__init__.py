"""The explorer: a web page that explains images."""
