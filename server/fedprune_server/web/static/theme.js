// Light, dark, or as the system has it. A cookie keeps the choice, so that the server draws pages in it from the start.

const NEXT = { auto: "light", light: "dark", dark: "auto" };
const NAMES = { auto: "Auto", light: "Light", dark: "Dark" };

export function watchTheme() {
  const button = document.getElementById("theme");
  button?.addEventListener("click", () => {
    const root = document.documentElement;
    const theme = NEXT[root.dataset.theme] ?? "auto";
    root.dataset.theme = theme;
    button.textContent = NAMES[theme];
    button.setAttribute("aria-label", `Colours: ${theme}`);
    const secure = location.protocol === "https:" ? "; Secure" : "";
    document.cookie = `fedprune_theme=${theme}; Path=/; Max-Age=31536000; SameSite=Strict${secure}`;
  });
}
