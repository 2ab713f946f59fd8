// A classic script in the head, not a module: it runs before the first paint, so that no other theme flashes up.
try {
  const theme = localStorage.getItem("moesaic.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is forbidden: the system's theme holds.
}
