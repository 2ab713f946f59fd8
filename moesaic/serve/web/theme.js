// This is a classic script, not a module, so that it sets the theme before the first paint.
try {
  const theme = localStorage.getItem("moesaic.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is disabled; the page uses the system's theme.
}
