"""What a Pyro model or guide is: its structure, its log density, and runs on many draws."""
