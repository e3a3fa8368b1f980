"""From the service's database to training rows."""
