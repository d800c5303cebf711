"""GroceryStoreDataset as composed queries: photographs, and what each product is."""
