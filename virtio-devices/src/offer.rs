//! Devices that a VMM offers by name: what can be chosen of one, its option and how it is made are in the device's own file, and a line in
//! the list of [`offered!`](crate) registers it. They need nothing of the machine but what every device gets, and [`Services`].

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use option_parser::OptionError;
use thiserror::Error;
use vm_virtio::{DeviceMemory, VirtioDevice};

/// What can be chosen of a device: the member of the configuration that has its name, and the option of that name.
pub trait Offer: Sized {
    /// What `--help` says of the option.
    const HELP: &'static str;
    /// What stands for the option's value in `--help`. Without it, the option is a switch.
    const VALUE: Option<&'static str>;

    /// Reads the text of `option`; of a switch, or where there is no text, it is empty.
    ///
    /// # Errors
    /// The text is wrong.
    fn parse(option: &'static str, text: &str) -> Result<Self, OptionError>;

    /// The device is to be behind the virtual IOMMU.
    fn iommu(&self) -> bool {
        false
    }

    /// The device, if there is to be one.
    ///
    /// # Errors
    /// What stands in the way on the host.
    fn make<M: DeviceMemory>(
        &self,
        id: &str,
        services: &Services,
    ) -> Result<Option<Box<dyn VirtioDevice<M>>>, HostError>;
}

/// What stands in a device's way on the host.
pub type HostError = Box<dyn Error + Send + Sync>;

/// What such a device may ask of its machine.
#[derive(Clone)]
pub struct Services {
    /// Starts the machine anew, for a reason that is to be told. From any thread.
    pub start_anew: Arc<dyn Fn(&str) + Send + Sync>,
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Services").finish_non_exhaustive()
    }
}

/// An option as a command line has it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OfferedOption {
    /// With its dashes.
    pub name: &'static str,
    /// [`Offer::VALUE`].
    pub value: Option<&'static str>,
    /// [`Offer::HELP`].
    pub help: &'static str,
}

/// A device that was made.
pub struct Made<M> {
    /// What it is called.
    pub id: &'static str,
    /// It is to be behind the virtual IOMMU.
    pub iommu: bool,
    /// The device.
    pub device: Box<dyn VirtioDevice<M>>,
}

/// A device that cannot be made as its option says.
#[derive(Debug, Error)]
#[error("{option}")]
pub struct OfferError {
    /// The option.
    pub option: &'static str,
    /// What stands in the way.
    #[source]
    pub source: HostError,
}

/// Registers devices, a line each: `file: type of its configuration`. `cargo fmt` does not look into the files; `rustfmt` does.
macro_rules! offered {
    ($($name:ident: $config:ident,)*) => {
        $(
            mod $name;
            pub use $name::*;
        )*

        /// What a user chose of the devices that are offered by name.
        #[derive(Clone, Debug, Default, serde::Deserialize, Eq, PartialEq, serde::Serialize)]
        #[serde(default)]
        pub struct Offered {
            $(
                #[doc = concat!("`--", stringify!($name), "`.")]
                pub $name: $config,
            )*
        }

        impl Offered {
            /// Their options.
            pub const OPTIONS: &'static [offer::OfferedOption] = &[$(
                offer::OfferedOption {
                    name: concat!("--", stringify!($name)),
                    value: <$config as offer::Offer>::VALUE,
                    help: <$config as offer::Offer>::HELP,
                },
            )*];

            /// Takes the text of an option. False if it is none of these.
            ///
            /// # Errors
            /// The text is wrong.
            pub fn set(&mut self, option: &str, text: &str) -> Result<bool, option_parser::OptionError> {
                $(
                    let name = concat!("--", stringify!($name));
                    if option == name {
                        self.$name = offer::Offer::parse(name, text)?;
                        return Ok(true);
                    }
                )*
                Ok(false)
            }

            /// One of them is to be behind the virtual IOMMU.
            pub fn wants_iommu(&self) -> bool {
                $(offer::Offer::iommu(&self.$name) ||)* false
            }

            /// Makes those that are wanted, in the order of the list.
            ///
            /// # Errors
            /// The first that cannot be made.
            pub fn make<M: vm_virtio::DeviceMemory>(
                &self,
                services: &offer::Services,
            ) -> Result<Vec<offer::Made<M>>, offer::OfferError> {
                let mut all = Vec::new();
                $(
                    let id = concat!("_", stringify!($name));
                    let made = offer::Offer::make(&self.$name, id, services);
                    let made = made.map_err(|source| offer::OfferError {
                        option: concat!("--", stringify!($name)),
                        source,
                    })?;
                    all.extend(made.map(|device| offer::Made {
                        id,
                        iommu: offer::Offer::iommu(&self.$name),
                        device,
                    }));
                )*
                Ok(all)
            }
        }
    };
}
pub(crate) use offered;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Offered;
    use vm_virtio::testing::TestMemory;

    fn services() -> Services {
        Services {
            start_anew: Arc::new(|_| {}),
        }
    }

    #[test]
    fn options_become_the_configuration_and_that_its_json() {
        let mut offered = Offered::default();
        assert_eq!(offered.set("--watchdog", ""), Ok(true));
        assert_eq!(offered.set("--rng", "src=/dev/zero,iommu=on"), Ok(true));
        assert_eq!(offered.set("--disk", "path=/d"), Ok(false));
        assert!(offered.set("--rng", "sauce=/dev/zero").is_err());
        assert!(offered.wants_iommu());
        let json = r#"{"rng":{"src":"/dev/zero","iommu":true},"watchdog":true}"#;
        assert_eq!(serde_json::to_string(&offered).unwrap(), json);
        assert_eq!(serde_json::from_str::<Offered>(json).unwrap(), offered);
        let names: Vec<_> = Offered::OPTIONS.iter().map(|option| option.name).collect();
        assert_eq!(names, ["--rng", "--watchdog"]);
    }

    #[test]
    fn what_is_wanted_is_made() {
        let mut offered = Offered::default();
        let ids = |offered: &Offered| -> Vec<(&str, bool)> {
            let made = offered.make::<TestMemory>(&services()).unwrap();
            made.iter().map(|made| (made.id, made.iommu)).collect()
        };
        // There is always entropy.
        assert_eq!(ids(&offered), [("_rng", false)]);
        offered.set("--watchdog", "").unwrap();
        offered.set("--rng", "iommu=on").unwrap();
        assert_eq!(ids(&offered), [("_rng", true), ("_watchdog", false)]);
    }

    #[test]
    fn what_cannot_be_made_is_told_by_its_option() {
        let mut offered = Offered::default();
        offered.set("--rng", "src=/nowhere").unwrap();
        let Err(error) = offered.make::<TestMemory>(&services()) else {
            panic!("made of nothing");
        };
        assert_eq!(error.to_string(), "--rng");
        assert!(error.source.to_string().contains("/nowhere"), "{error:?}");
    }
}
