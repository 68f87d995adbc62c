"""What stands behind the tabs: runs, visitors, limits, processes; nothing here lays anything out."""
